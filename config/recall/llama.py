"""
Recall with full attention alone: it sees every pair, for the largest cache, and is slow to learn where a pair stands
(at a third or twice the rate, or with some seeds, 16,000 steps are not enough).

Data: python recall.py
"""

pattern = "TTTT"
n_embd = 128
n_head = 4
n_kv_head = 2
n_hidden = 588
n_meta = 0
window = 64
block_size = 1024

dataset = "recall"
data_command = "python recall.py"
out_dir = "out/recall_llama"
batch_size = 16
max_steps = 16000
warmup_steps = 200
decay_steps = 4000
learning_rate = 3e-3
eval_interval = 2000
eval_windows = 448
sample_tokens = 0

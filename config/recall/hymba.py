"""
Recall with hybrid heads: full attention in the first and the last block, windows of 64 tokens between them, SSM heads
in all. 1.36M parameters; the other files of this folder have as many (within 0.1%). With --pattern=hhhh, windows alone.

Data: python recall.py
"""

pattern = "HhhH"
n_embd = 128
n_head = 4
n_kv_head = 2
n_hidden = 320
n_meta = 16
window = 64
block_size = 1024

dataset = "recall"
data_command = "python recall.py"
out_dir = "out/recall_hymba"
batch_size = 16
max_steps = 16000
warmup_steps = 200
decay_steps = 4000
learning_rate = 3e-3
eval_interval = 2000
eval_windows = 448
sample_tokens = 0

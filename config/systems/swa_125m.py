"""
Llama with a sliding window of 1,024 tokens in every block and no meta tokens, at Hymba-125M's parameters: cheap, and
blind to all that lies further back than the windows of its blocks add up to.

Data: python prepare.py python --site-packages --tokenizer=bpe:32000 --name=source
or your own text under another name, given as --dataset=NAME.
"""

pattern = "t" * 24
n_embd = 512
n_head = 8
n_kv_head = 4
n_hidden = 2560
n_meta = 0
window = 1024
kv_share = False
block_size = 2048

dataset = "source"
data_command = "python prepare.py python --site-packages --tokenizer=bpe:32000 --name=source"
batch_size = 16
grad_accum = 8
max_steps = 10000
warmup_steps = 200
decay_steps = 2000
learning_rate = 3e-3
min_lr = 1e-5
eval_interval = 500

"""
Hymba-125M with three quarters of a block's channels for attention (12 query heads) and a quarter for SSM heads, at its
parameters (within 0.4%). Bae et al. find a wider attention better, and an even split practical.

Data: python prepare.py python --site-packages --tokenizer=bpe:32000 --name=source
or your own text under another name, given as --dataset=NAME.
"""

fusion = "concat"
n_layer = 24
n_embd = 512
n_head = 12
n_kv_head = 6
head_size = 64
n_hidden = 1536
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

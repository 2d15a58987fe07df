"""
Hymba-125M with Mamba-2's SSM heads (a state of 128 numbers instead of 16 for each channel, 0.4% more parameters).
262,144 tokens a step, 2.6 billion in all.

Data: python prepare.py python --site-packages --tokenizer=bpe:32000 --name=source
or your own text under another name, given as --dataset=NAME.
"""

n_layer = 24
n_embd = 512
n_head = 8
n_kv_head = 4
n_hidden = 1664
ssm = "mamba2"
d_state = 128
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

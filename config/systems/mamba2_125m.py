"""
Mamba-2 at Hymba-125M's width and parameters (within 0.1%): heads of 64 channels with a state of 128 numbers for each
channel, no feed-forward, so 66 blocks instead of 24. With eight times Mamba's state, it should recall more.

Data: python prepare.py python --site-packages --tokenizer=bpe:32000 --name=source
or your own text under another name, given as --dataset=NAME.
"""

pattern = "M" * 66
ssm = "mamba2"
d_state = 128
n_embd = 512
n_hidden = 0
n_meta = 0
block_size = 2048

dataset = "source"
data_command = "python prepare.py python --site-packages --tokenizer=bpe:32000 --name=source"
batch_size = 8
grad_accum = 16
max_steps = 10000
warmup_steps = 200
decay_steps = 2000
learning_rate = 3e-3
min_lr = 1e-5
eval_interval = 500

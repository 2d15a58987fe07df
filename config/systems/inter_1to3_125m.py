"""
Inter-layer hybrid (Bae et al. 2025, https://arxiv.org/abs/2510.04800) at Hymba-125M's parameters (within 0.4%): whole
blocks of Transformer and of Mamba-2, 1:3, spread evenly, never a Transformer block first. Between the paper's best
ratio (1:1) and its trade-off (1:5).

Data: python prepare.py python --site-packages --tokenizer=bpe:32000 --name=source
or your own text under another name, given as --dataset=NAME.
"""

hybrid = "inter:1:3:spread"
n_layer = 24
n_embd = 512
n_head = 8
n_kv_head = 4
n_hidden = 2112
ssm = "mamba2"
d_state = 128
n_meta = 0
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

"""
Intra-layer hybrid (Bae et al. 2025, https://arxiv.org/abs/2510.04800) at Hymba-125M's parameters (within 0.4%): hybrid
blocks among Mamba-2 blocks, 1:5, scattered evenly. As the paper advises, each head is normed by itself, without a
learned scale, and SSM heads are subtracted from attention heads. The paper's trade-off. --hybrid=intra:1:5:sandwich
and intra:1:5:clustered place the same blocks elsewhere: the paper finds scattered ones best, and a sandwich bad.

Data: python prepare.py python --site-packages --tokenizer=bpe:32000 --name=source
or your own text under another name, given as --dataset=NAME.
"""

hybrid = "intra:1:5:scattered"
fusion = "diff"
branch_norm = "group"
branch_scale = False
n_layer = 24
n_embd = 512
n_head = 8
n_kv_head = 4
n_hidden = 1888
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

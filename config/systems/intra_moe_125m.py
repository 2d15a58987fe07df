"""
Intra-layer hybrid 1:5 with a mixture of experts: 8 in each block, 2 for each token. As many parameters work on a token
as in Hymba-125M (within 0.4%), of 339 million in all. Bae et al. (Table 3, 1B): loss 2.512 becomes 2.424.

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
n_hidden = 944
n_expert = 8
n_expert_active = 2
ssm = "mamba2"
d_state = 128
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

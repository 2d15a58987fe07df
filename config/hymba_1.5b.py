"""
Hymba-1.5B: 32 blocks, 1,600 wide, with the paper's length curriculum: 2,048 tokens first, 8,192 at the end, where RoPE
is stretched by NTK. 524,288 tokens a step in one process; use torchrun for more. With --anneal_dataset=NAME, the
paper's data annealing: that (better) data set is mixed in while the rate decays.

Data: python prepare.py python --site-packages --tokenizer=bpe:32000 --name=source
or your own text under another name, given as --dataset=NAME.
"""

n_layer = 32
n_embd = 1600
n_head = 25
n_kv_head = 5
n_hidden = 5504
block_size = 2048
rope_orig = 2048
length_stages = "2048:36000,8192:4000"

dataset = "source"
data_command = "python prepare.py python --site-packages --tokenizer=bpe:32000 --name=source"
batch_size = 4
grad_accum = 64
max_steps = 40000
warmup_steps = 1000
decay_steps = 8000
learning_rate = 3e-3
min_lr = 1e-5
eval_interval = 500

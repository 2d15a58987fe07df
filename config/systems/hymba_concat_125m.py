"""
Hymba-125M whose heads are concatenated instead of averaged, at its parameters (within 0.3%): a wider output
projection, a narrower feed-forward. In Hymba's ablations (Table 10: 9 and 11), this is half as fast, and 0.6 points
worse in general.

Data: python prepare.py python --site-packages --tokenizer=bpe:32000 --name=source
or your own text under another name, given as --dataset=NAME.
"""

fusion = "concat"
n_layer = 24
n_embd = 512
n_head = 8
n_kv_head = 4
n_hidden = 1312
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

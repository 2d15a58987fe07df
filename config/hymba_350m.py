"""
Hymba-350M: 32 blocks, 768 wide, full attention in blocks 0, 15 and 31. 262,144 tokens a step, 5.2 billion in all.

Data: python prepare.py python --site-packages --tokenizer=bpe:32000 --name=source
or your own text under another name, given as --dataset=NAME.
"""

n_layer = 32
n_embd = 768
n_head = 12
n_kv_head = 4
n_hidden = 2432
block_size = 2048

dataset = "source"
data_command = "python prepare.py python --site-packages --tokenizer=bpe:32000 --name=source"
batch_size = 8
grad_accum = 16
max_steps = 20000
warmup_steps = 200
decay_steps = 4000
learning_rate = 3e-3
min_lr = 1e-5
eval_interval = 500

"""A Hymba with every feature on that trains in minutes on two CPU cores, on the source code of Python's library."""

dataset = "python"
pattern = "HhhHhhH"
block_size = 256
n_embd = 128
n_head = 4
n_kv_head = 2
n_hidden = 320
d_state = 8
n_meta = 16
window = 64

batch_size = 8
max_steps = 500
warmup_steps = 50
decay_steps = 150
learning_rate = 3e-3
eval_interval = 100
eval_windows = 64

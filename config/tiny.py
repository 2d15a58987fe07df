"""
A Hymba with every feature on (meta tokens, sliding windows, shared keys and values, SSM heads) that trains in minutes
on two CPU cores, on the source code of Python's own library. Expect about 2 bits per byte: text that looks like Python.

Baselines with as many parameters (within 0.4%), the same tokens and rate:
    python train.py config/tiny.py --pattern=TTTT --n_hidden=572 --n_meta=0 --out_dir=out/tiny_T
    python train.py config/tiny.py --pattern=MMMM --n_hidden=416 --n_meta=0 --out_dir=out/tiny_M
"""

dataset = "python"
pattern = "HhhH"
block_size = 128
n_embd = 128
n_head = 4
n_kv_head = 2
n_hidden = 320
d_state = 8
n_meta = 16
window = 32

batch_size = 8
max_steps = 800
warmup_steps = 50
decay_steps = 300
learning_rate = 3e-3
eval_interval = 200
eval_windows = 256
prompt = "def "

"""
What all runs of study.py share. It adds sizes, the system, the schedule and the rate; python study.py --list names the
runs, and docs/results.md says what came out.

Data: python prepare.py python --site-packages --tokenizer=bpe:16384 --name=study
"""

dataset = "study"
data_command = "python prepare.py python --site-packages --tokenizer=bpe:16384 --name=study"
vocab_size = 16384
d_state = 16
n_meta = 0
eval_windows = 512
sample_tokens = 0

"""Values of bitsandbytes, PEFT and transformers, and what made them.

`weights.py` makes the inputs and `cases.py` names the questions (numpy alone),
`strangers.py` asks the real libraries, `make.py` writes the committed files.
"""

"""What can be wrong before a run starts: cheap checks at every start, all of them in `train --dry-run`.

Begin with before_torch.py:

before_torch.py       in a second: run file, folder, rows, trackers, launch, DeepSpeed file
at_start.py           at every start, on each rank: the plan, hub files, memory and disk
room.py               memory and disk that are free, against the plan
launcher_settings.py  what the Accelerate config says and the run file decides
this_rank.py          `--dry-run`: base, tokenizer, rows, plan and room as this rank sees them
across_ranks.py       clocks, the shared folder, and what differs from rank to rank
dry_run.py            all of it as one table on rank 0
"""

"""What can be wrong before a run starts. A start makes the checks of the first five; `train --dry-run` all, as a table.

Begin with before_torch.py:

before_torch.py         in a second: run file, folder, rows, launch, DeepSpeed file
trackers_and_inputs.py  trackers, and the files and ids that the run reads
base_and_plan.py        the base's shape, what `auto` becomes, and the plan
memory_and_disk.py      what is free against the plan; the master's port
launcher_settings.py    what the Accelerate config says and the run file decides
dry_run_checks.py       the list of `--dry-run`, in its order: base, tokenizer, rows and plan as this rank sees them
dry_run.py              all of it as one table on rank 0; across_ranks.py: clocks, the shared folder, ranks that differ
hub.py, context_window.py and collect.py: ids that no hub has, long rows against LongRoPE, problems kept till the end
"""

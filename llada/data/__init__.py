"""Prepared corpora on disk, and what a training step reads of them. Knows no model and no ranks.

From shards on disk to the loss, a pretraining sample goes through ten files:

1. `data/mixture.py`: the sample's index gives its corpus and its instance there.
2. `data/pretrain.py`: the step's index gives its StepPlan: the instances of its samples, where
   each is cut into segments, and every segment's t and weight.
3. `data/training_data.py`: some samples of the plan become the windows of a micro-batch.
4. `data/shard_reader.py`: a window is read: its token ids and document boundaries.
5. `objectives/masked.py`: a window is masked, given its t and its sample's index.
6. `objectives/base.py`: masked windows are stacked into a Batch.
7. `engine/rank_batch.py`: this rank's part is cut out of the batch.
8. `engine/megatron.py`: Megatron-Core's schedule runs the model and adds up the weighted losses.
9. `model/transformer.py`: token ids become logits of the predicted positions.
10. `model/token_losses.py`: a position's logits and its clean token give a loss.

Read beside them: `noise.py`, where 1, 2 and 5 draw their numbers; `data/step_plan.py`, what 2 hands
to 3; `model/attention.py`, inside 9. `Run.make_batches` in `training/run.py` calls 2 to 7, in a
thread of `data/loader.py` that keeps the next steps ready. Fine-tuning has `data/sft.py` as 2.

A corpus is written by the other files: `shard_format.py` and `shard_writer.py` (shards),
`manifest.py` (what the folder contains), `corpus.py` (both together), `open_files.py` (a limit on
open files) and `verify.py` (the full check).
"""

"""Prepared corpora on disk, and what a training step reads of them. Knows no model and no ranks.

From shards on disk to the loss, a pretraining sample goes through ten files:

1. `data/mixture.py`, `Mixture.lookup`: a sample's index gives its corpus and its instance there.
2. `data/pretrain.py`, `PretrainData.plan`: a step's index gives its StepPlan: the windows of its
   samples, where each is cut into attention segments, and every noise group with its t.
3. `data/training_data.py`, `TrainingData.batch`: samples of the plan become a micro-batch.
4. `data/shard_reader.py`, `ShardReader.tokens`: the token ids of a window are read.
   `WindowReader` in `data/pretrain.py` says which.
5. `objectives/masked.py`, `MaskedDiffusion.corrupt`: a row is masked, and every masked position
   becomes a term of the loss with its weight.
6. `objectives/batch.py`, `collate`: corrupted rows are stacked into a Batch.
7. `engine/rank_batch.py`, `rank_batch`: this rank's part is cut out of the batch.
8. `engine/megatron.py`, `MegatronEngine.train_step`: Megatron-Core's schedule runs the model and
   adds up the weighted losses.
9. `model/transformer.py`, `BidirectionalTransformer.forward`: token ids become hidden states.
10. `model/head_loss.py`, `Head.weighted_loss`: the states that terms read become logits,
    and these become losses and gradients, chunk by chunk.

2 calls 1, 3 calls 4 to 6, and 9 calls 10. `Run.make_batches` in `training/run.py` calls 2, 3 and 7,
in a thread of `data/loader.py` that keeps the next steps ready; the loop in `training/loop.py`
calls 8.
Read beside them: `noise.py`, where 1, 2 and 5 draw their numbers; `data/step_plan.py`, what 2 hands
to 3; `objectives/row.py`, what 3 hands to 5; `sample_offsets` in `engine/layout.py`, which samples
a replica reads; `model/attention.py`, inside 9. Fine-tuning has `data/sft.py` as 2; `data/tasks.py`
chooses.

The other files are about a corpus on disk. `shard_format.py`, `shard_writer.py` and `manifest.py`
(what the folder contains) write it; `corpus.py` opens it, with `open_files.py` as a limit on open
files, and `verify.py` is the full check.
"""

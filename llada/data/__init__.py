"""Prepared corpora on disk, and what a training step reads of them. Knows no model and no ranks.

The way of a sample from disk to loss, with one file a hop:

1. `data/loader.py` prepares the next steps in a thread (`Run.make_batches` joins the hops below).
2. `data/pretrain.py`, or `data/sft.py`, makes the StepPlan of a step from its index: which
   instances its samples are, how each is cut into segments, and the t and weight of each segment.
3. `data/mixture.py` says which instance of which corpus a sample is.
4. `data/training_data.py` makes a micro-batch of some samples of the plan, window by window.
5. `data/shard_reader.py` reads a window's token ids and the document starts in it.
6. `objectives/masked.py` masks the window, given t and the sample's index as the key of the noise.
7. `objectives/base.py` stacks the masked windows into a Batch.
8. `engine/rank_batch.py` cuts out the part of the batch that this rank computes.
9. `engine/megatron.py` runs the model on it and adds the weighted losses up.
10. `model/token_losses.py` computes the loss of each predicted token from its logits.

A corpus is written by the other files: `shard_format.py` and `shard_writer.py` (shards),
`manifest.py` (what the folder holds), `corpus.py` (both together) and `verify.py` (the full check).
"""

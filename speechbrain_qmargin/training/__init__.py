"""A run, from a YAML to its results.

1. ``config`` composes the experiment of a YAML, its overlays and the command line; ``trust`` says
   what a YAML that came with somebody's folder may name.
2. ``run`` does what every recipe does, in its order. ``run_folder`` keeps the output folder for
   one experiment and one start, ``processes`` joins those that torchrun started.
3. ``pretrained`` loads the weights to start from.
4. ``brain`` takes batches to embeddings to the loss: with rates and margins of ``schedules``,
   layers of ``freezing``, prototypes of ``prototype_reset``, and on several CPUs the statistics of
   ``batch_norm``. ``checkpoints`` and ``history`` keep what it did.
5. ``extraction`` embeds what is tested; ``results`` scores the trials and writes the tables.

``internals`` alone touches SpeechBrain's private names.
"""

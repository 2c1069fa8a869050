"""Sound, from a data folder to a batch.

labels, tau22                     scenes and devices; the lists of a data folder, its splits
sound, recordings                 sound files; recordings of any length, cut into windows
pack, packing                     one file in place of thousands, and how it is made
cores                             work on many files in several processes
dataset, loading                  clips with their sound, in batches; which folder and clips
logmel, augment, responses        the front end; augmentation; device responses
synth                             SynthTAU
"""

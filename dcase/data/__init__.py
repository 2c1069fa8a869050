"""Sound, from a data folder to a batch.

sound, recordings    sound files; recordings of any length, cut into windows
pack, packing        one file in place of thousands, and how it is made
dataset              clips with their sound, a batch at a time
cores                work over all cores
"""

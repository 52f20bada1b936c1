"""Other software that packs, each set up as its own documentation says and fed with kimivl's own encoder.

Every module has ``packs(workload)``: one epoch over the realistic set by one worker process, as an iterator of
packs. What differs between the sides is so the reading, the packing and the way to the training process alone.
"""

"""Makes the models that ship with rlcm_fast from a seed: `python -m rlcm_fast.shapes.pretrain all`.

Data flow: `dataset` renders scenes -> `vae` learns the latents -> `teacher` learns to denoise them given captions
-> `lcm` distils the teacher into a latent consistency model -> `report` scores both.
"""

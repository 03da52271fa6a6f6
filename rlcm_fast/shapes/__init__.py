"""ShapesWorld: a small, real text-to-image problem with exact rewards and the models that ship with rlcm_fast."""

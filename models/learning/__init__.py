"""Learning a light encoder: `slimmable` and `synthesis` are the networks, `train` teaches them, `assemble` makes split
points of a bundle from them.

photographs --views--> pixels --SlimmableEncoder, one width--> latent --surrogate--> latent' --Synthesis--> features
                       the uncut model's features and scores <---- metric, in nats ----> features, --tail--> scores
"""

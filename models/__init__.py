"""What both sides must agree on (numpy only), and how it is learned (torch).

Edge-safe, in the order a frame meets them: `operating_point`, `quantiser`, `entropy_coder`, `bitstream`, `codec`;
`bundle` holds what they need. The other modules import torch and are for the server and for making bundles.
"""

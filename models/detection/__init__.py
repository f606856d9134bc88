"""Detection: labelled pictures, COCO's average precision, and the filter that keeps empty pictures on the device.

What a detector's outputs mean is in `models.tasks`; what it is made of, in `models.zoo`.
"""

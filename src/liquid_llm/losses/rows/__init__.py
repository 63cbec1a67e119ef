"""The loss of rows of logits and the gradient by them, behind one interface; which form is used where, and why.

    eager      torch's own operations, over slices that stay in a core's cache: every divergence, every dtype
    compiled   the same, its divergence compiled by torch for the device
    triton     two passes by Triton's kernels: the forward KL and the cross-entropy, in float32
    memory     the memory of ``triton`` without the work: for tensors without values

All are called alike (``opening.Rows``) and differ by rounding alone. ``choice`` says which form a device has;
``opening`` gives it to a loss, and the eager form where the chosen one has no answer.
"""

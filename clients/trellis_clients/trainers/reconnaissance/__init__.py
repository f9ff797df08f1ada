"""Federated reconnaissance (Hendryx et al., 2021): clients learn classes in the field, the cloud merges what they know.

``recon_protonet`` is the paper's method, the others are its yardsticks in the same framework: fine-tuning with
averaged weights, which forgets (the lower bound); iCaRL, which keeps a few images; training on all images ever seen
by anybody (the upper bound). ``_recon`` is what they share: missions, the table of classes, evaluation.
"""

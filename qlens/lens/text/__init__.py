"""Text: explanations of many tokens at a large vocabulary, without a pass over all logits at once.

``explained`` analyses a loss on some tokens, which ``sampling`` chooses, and confirms what it finds on all of them, some rows
at a time (``chunks``); ``figures`` are what a target shows at every token, ``coverage`` says what was analysed and confirmed.
"""

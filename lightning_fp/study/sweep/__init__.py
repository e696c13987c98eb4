"""Sweeps: precision x learning rate x seed, every cell a short run, and what the cells say.

`grid` lists the cells, `storage` deals them out to workers and keeps what they found, `work`
trains them one after the other, `findings` reads rates and ranges off them.
"""

"""Chaos test: disturb one real command, run it again, and check that nothing shows.

    make chaos                          # about four minutes: every kind of trial at least once
    make chaos SAMPLE=4                 # in .ci/run: the short kinds, and 4 of the 11 long ones
    make chaos MINUTES=30 SEED=7        # longer, and the same trials as the last run with this seed
    make chaos TRIAL='kill command=render signal=KILL to=process moment=operation:17'

A trial restores a prepared state, disturbs one command (a signal, a full disk, other processes in the same output),
and then demands what `invariants.py` lists: a proper exit code and message, no process or file left behind, a public
link that leads to a whole repository or to none, the user's own files untouched, and after a second, undisturbed run
the same bytes as a run that was never disturbed.
"""

"""What the engine takes beside what it must take: latency, throughput, memory.

Ours, the plain path and the ceilings are timed in turns, in one run: a shared host's memory is half
as fast from one second to the next. The least of each counts.
"""

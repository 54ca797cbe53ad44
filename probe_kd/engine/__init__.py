"""What is inside a model, and how it is read: names, traces, probes, matching, surgery."""

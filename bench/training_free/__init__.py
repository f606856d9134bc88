"""Training-free codecs for intermediate features, from papers, as baselines for `headrace eval rd`.

Each is written by our own hand after its paper, calibrated on the photographs that the bundle's tables come from, and
codes to real bytes that are decoded again. What a paper's published description leaves open is chosen in favour of the
baseline; each module says where. All of them are given

* static tables from the calibration photographs under CompressAI's rANS, in place of adaptive arithmetic coding from a
  cold start or of frequency tables in the stream, and nothing is counted for these tables;
* no packet header, no checksum, no slices: their bytes are the coded stream's own length.

calibrate(features of calibration photographs) -> one codec a rate setting;  features -> encode -> bytes -> decode
"""

# The first base of every config with an mmseg:: base: under MMSegmentation's fork, MMEngine finds
# its configs only after this import, and custom_imports would run too late. It is no import
# statement because that would make MMEngine take this for a config of another kind.
__import__('acmix_mm')

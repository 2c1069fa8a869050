"""The folder of a submission to the challenge: its parts, their checks, and the code that runs in it.

package                       the folder, and what is where in it
challenge_api, inference      copied into it: what the challenge calls, and what that needs
build_backend, probe          how it is installed; how the validator calls it
output, meta, meta_check      output.csv and meta.yaml, made and checked
"""

#!/bin/sh
# ptxas_log.sh FOLDER COMPILER ARGS...: runs the compiler; what ptxas says about registers and spills goes to
# FOLDER/ptxas-<object>.log instead of the screen. tests/test_cuda_build.py reads it.
folder=$1
shift
name= previous=
for argument; do
  [ "$previous" = "-o" ] && name=$(basename "$argument")
  previous=$argument
done
log="$folder/ptxas-${name:-unknown}.log"
"$@" 2>"$log.all"
status=$?
grep -v -e '^ptxas info' -e 'bytes stack frame' -e '^[[:space:]]*$' "$log.all" >&2
mv "$log.all" "$log"
exit $status

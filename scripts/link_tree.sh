# Sourced by scripts/typecheck and scripts/docs: tools that read the code without installing it know nothing of
# setuptools' package-dir, so they get a tree of links, .typecheck/saekit, that shows the four code folders as the one
# package they install as.
rm -rf .typecheck/saekit
mkdir -p .typecheck/saekit
for entry in saekit/*; do ln -s "../../$entry" .typecheck/saekit/; done
for folder in activations trainers evals; do ln -s "../../$folder" .typecheck/saekit/; done

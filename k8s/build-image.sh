#!/usr/bin/env bash
# Builds the container image, and pushes it if asked; make image calls this.
#   VARIANT     gpu or cpu
#   IMAGE       name to build under, by default babelray:VARIANT; needed to push
#   PUSH        not empty: push, and write the reference by digest to .image-VARIANT, which make
#               launch uses: cpu for the overlay cpu-smoke, gpu for all others
#   BUILD_ARGS  further words for docker build or podman build
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { # STATUS MESSAGE
    echo "make image: error: $2" >&2
    exit "$1"
}

variant=${VARIANT:-gpu}
[[ $variant == gpu || $variant == cpu ]] || fail 2 "VARIANT is '$variant': say gpu or cpu"
[[ -n ${IMAGE:-} || -z ${PUSH:-} ]] || fail 2 "where to push to? Say IMAGE=REGISTRY/NAME:TAG"
image=${IMAGE:-babelray:$variant}
engine=$(command -v docker || command -v podman) ||
    fail 2 "neither docker nor podman is installed: one of them has to build the image"

revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
[[ -z $(git status --porcelain 2>/dev/null) ]] || revision=$revision-dirty

# shellcheck disable=SC2086  # several words
"$engine" build --build-arg "VARIANT=$variant" --build-arg "REVISION=$revision" ${BUILD_ARGS:-} \
    --tag "$image" .
if [[ -z ${PUSH:-} ]]; then
    echo "built $image"
    exit
fi

"$engine" push "$image"
name=$image
[[ ${image##*/} == *:* ]] && name=${image%:*}
pushed=$("$engine" image inspect --format '{{range .RepoDigests}}{{println .}}{{end}}' "$image" |
    grep -F "$name@" | tail -n 1) ||
    fail 1 "$image is pushed, but $engine does not tell its digest: see the registry"
echo "$pushed" >".image-$variant"
echo "pushed $pushed: make launch uses it (.image-$variant)"

#!/usr/bin/env bash
# Publishes the project: `release` makes the release commit and the git tag that GitHub builds from and pushes both, `direct`
# builds and pushes the image from this machine. Usage: scripts/deploy.sh --help
set -euo pipefail
set +a # what is set here is for nobody else (bash -a would give it to every program)
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly IMAGE=generative-img-serving
readonly VERSION_FILE=src/img_serving/__init__.py CHANGELOG=CHANGELOG.md
readonly FAILED=1 MISUSED=2 REFUSED=3 LACKING=4

usage() {
  cat <<'USAGE'
Usage: scripts/deploy.sh release [-v VERSION] [-d] [-f]
       scripts/deploy.sh direct  [-v VERSION] [-b]

release  Make the annotated tag vVERSION with the notes of CHANGELOG.md, and push it. GitHub then builds and publishes the
         image and the release (.github/workflows/docker-publish.yml). Needs git and python3, and no credentials here.
         Where VERSION is new, or CHANGELOG.md has no section of it, one commit "Release VERSION" is made first, as you and
         with your hooks: it sets __version__ in src/img_serving/__init__.py, and moves what is under "## [Unreleased]" in
         CHANGELOG.md below "## [VERSION] - YYYY-MM-DD" of today. The branch is pushed with the tag, both or neither, where
         the remote lacks it or commits of it. If a step fails, the commit and the tag are taken back. One release at a time.
  -v, --version VERSION  the version to release, instead of the one in src/img_serving/__init__.py. A lower one is refused:
                         1.1.4 after 1.2.0 is released from a branch that says 1.1.3
  -d, --dry-run          say everything that would be done, and what is in the way; change nothing
  -f, --force            move the tag if it exists, here and on the remote; nothing else is forced

direct   Build the image on this machine, for its architecture, and push it to Docker Hub as VERSION, the series (1.2 of
         1.2.3) and latest; a pre-release (1.2.3rc1) only as itself. What has these tags now is replaced.
  -v, --version VERSION  tag the image with this version instead of the project's
  -b, --build-only       build it and stop: no login, no push, no credentials needed

  -h, --help             this text

.env (made from .env.example) may hold DOCKER_HUB_USERNAME and DOCKER_HUB_TOKEN for `direct`; the environment wins over it.
It is read, never executed, and the rest of it is ignored. The login lives in a folder of its own that is removed at the end.

Exit status: 0 done (or: nothing is in the way of it), 1 a step failed, 2 wrong usage, 3 refused, and nothing was changed,
4 something is missing: docker, git or the credentials.
USAGE
}

red='' bold='' plain=''
if [[ -t 2 && -z ${NO_COLOR:-} && ${TERM:-dumb} != dumb ]]; then red=$'\e[31m' plain=$'\e[0m'; fi
if [[ -t 1 && -z ${NO_COLOR:-} && ${TERM:-dumb} != dumb ]]; then bold=$'\e[1m' plain=$'\e[0m'; fi

say() { printf '%s\n' "$bold$*${bold:+$plain}"; }
note() { printf 'note: %s\n' "$*" >&2; }
complain() { printf '%s\n' "${red}deploy: $*${red:+$plain}" >&2; }
die() { # STATUS MESSAGE
  complain "$2"
  exit "$1"
}
misuse() { die "$MISUSED" "$1 (scripts/deploy.sh --help)"; }

# What is in the way is collected, so that one run tells all of it.
problems=()
problem() { problems+=("$1"); }
refuse_if_any() {
  local one
  [[ ${#problems[@]} -gt 0 ]] || return 0
  for one in "${problems[@]}"; do complain "refused: $one"; done
  exit "$REFUSED"
}

# An address may hold a password (https://name:token@host/…): nobody needs to see it.
without_userinfo() { sed -E 's#(://)[^/@[:space:]]*@#\1#g'; }

need() { # PROGRAM WHAT-TO-DO
  command -v "$1" >/dev/null || die "$LACKING" "$1 is not on PATH: $2"
}

# --- what the two modes share -----------------------------------------------------------------------------------------

changes=''
read_changes() { # uncommitted ones and untracked files, whatever the user's git is configured to show
  changes=$(git status --porcelain --untracked-files=normal --ignore-submodules=none) || die "$FAILED" "git status failed here: $PWD"
}

summary_of_changes() {
  local count
  count=$(wc -l <<<"$changes")
  head -n 3 <<<"$changes" | sed 's/^...//' | paste -sd ' ' | tr -d '\n'
  [[ $count -le 3 ]] || printf ' and %d more' $((count - 3))
}

# --- release ----------------------------------------------------------------------------------------------------------

remote='' remote_branch='' branch='' head=''
made_commit='' made_tag='' # the ids of what this run has made, and may take back
local_tag='' remote_tag='' remote_tag_commit='' remote_head=''
asked='' shown='' # the remote as git is asked about it, and as people are told: its name, or the address that it is pushed to
not_there='' # what the remote lacks of the branch, in words

sort_key() { # VERSION: of two keys the lower version's is first in the alphabet; 1.2.3.dev0 < 1.2.3a1 < 1.2.3rc1 < 1.2.3
  local stage=0
  [[ $1 =~ ^([0-9]+)\.([0-9]+)\.([0-9]+)((a|b|rc)([0-9]+))?(.*)$ ]] || return 0
  if [[ -z ${BASH_REMATCH[7]} ]]; then stage=${BASH_REMATCH[5]:-z}; fi
  printf '%018d%018d%018d%.1s%018d' "${BASH_REMATCH[@]:1:3}" "$stage" "${BASH_REMATCH[6]:-0}"
}

check_version() {
  local LC_ALL=C asked source
  asked=$(sort_key "$version") source=$(sort_key "$source_version")
  # an older series has a branch of its own, whose source says so: a lower version here is a slip
  [[ ! $asked < $source ]] ||
    problem "$version is lower than $source_version, which this branch says ($VERSION_FILE): release a higher one, or switch to the branch of that series"
}

lock() { # until this program ends: two releases in one repository would take each other's commit and tag for their own
  local file
  file=$(git rev-parse --git-common-dir)/deploy-release.lock # worktrees share their tags
  { exec 9>>"$file"; } 2>/dev/null || die "$FAILED" "$file cannot be written; nothing was changed"
  # Python's flock, since not every system has a program of that name
  python3 -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null ||
    die "$REFUSED" "refused: another release is under way in this repository: wait until it has ended"
}

find_branch() { # the branch, and where it is pushed to
  head=$(git rev-parse --verify --quiet HEAD) || die "$REFUSED" "refused: there is no commit yet"
  if ! branch=$(git symbolic-ref --quiet --short HEAD); then
    problem "HEAD is on no branch: switch to the branch that is released from (git switch main)"
    branch=''
  fi
  remote=$(git config "branch.$branch.remote" || true) # nothing for no branch
  remote_branch=$(git config "branch.$branch.merge" || true)
  if [[ -z $remote || $remote == . ]]; then remote=origin remote_branch=''; fi
  : "${remote_branch:=refs/heads/$branch}"
  if ! git config "remote.$remote.url" >/dev/null; then
    problem "there is no remote \"$remote\" to push the tag to: git remote add $remote ADDRESS"
    remote=''
    return
  fi
  find_address
}

find_address() { # what is looked at is what is pushed to, which need not be what is fetched from
  local addresses
  addresses=$(git remote get-url --push --all "$remote") || die "$FAILED" "git does not know where \"$remote\" is pushed to"
  if [[ $addresses == *$'\n'* ]]; then
    problem "the remote \"$remote\" is pushed to several addresses ($(without_userinfo <<<"$addresses" | paste -sd ' ')): a release goes to one, so make a remote of it (git remote add), and set it as the branch's (git config branch.${branch:-main}.remote NAME)"
    remote=''
    return
  fi
  asked=$remote shown=$remote
  if [[ $addresses != "$(git remote get-url "$remote")" ]]; then
    asked=$addresses shown=$(without_userinfo <<<"$addresses")
  fi
}

ask_remote() { # asks without fetching: a refusal and a dry run leave even the remote-tracking branches alone
  local said='' id name
  local_tag=$(git rev-parse --verify --quiet "refs/tags/$tag" || true)
  if [[ -z $remote ]]; then return; fi
  if ! said=$(git ls-remote "$asked" "$remote_branch" "refs/tags/$tag" "refs/tags/$tag^{}" 2>&1); then
    without_userinfo <<<"$said" >&2
    [[ $dry == yes ]] || die "$FAILED" "the remote \"$remote\" does not answer; nothing was changed"
    problem "the remote \"$remote\" does not answer"
    return
  fi
  while read -r id name; do
    case $name in
      "$remote_branch") remote_head=$id ;;
      "refs/tags/$tag") remote_tag=$id remote_tag_commit=${remote_tag_commit:-$id} ;;
      "refs/tags/$tag^{}") remote_tag_commit=$id ;;
      *) ;; # what git or ssh said besides
    esac
  done <<<"$said"
  if [[ -n $branch ]]; then check_branch; fi
}

check_branch() {
  local there=${remote_branch#refs/heads/} count
  if [[ -z $remote_head ]]; then
    not_there="which has no $there yet"
  elif [[ $remote_head != "$head" ]]; then
    if git merge-base --is-ancestor "$remote_head" "$head" 2>/dev/null; then
      count=$(git rev-list --count "$remote_head..$head")
      not_there="whose $there lacks $count commit$([[ $count == 1 ]] || echo s)"
    elif git merge-base --is-ancestor "$head" "$remote_head" 2>/dev/null || ! git cat-file -e "$remote_head" 2>/dev/null; then
      problem "$branch is behind $remote/$there, or apart from it: git pull --ff-only $shown $there"
    else
      problem "$branch and $remote/$there have gone apart: git pull --rebase $shown $there"
    fi
  fi
}

check_tag() { # FORCE
  [[ $1 == no ]] || return 0
  if [[ -n $local_tag && -n $remote_tag ]]; then
    problem "the tag $tag exists, here and on $remote (at ${remote_tag_commit:0:12}): raise the version, or move the tag with -f"
  elif [[ -n $remote_tag ]]; then
    problem "the tag $tag exists on $remote (at ${remote_tag_commit:0:12}), though not here: raise the version, or move the tag with -f"
  elif [[ -n $local_tag ]]; then
    problem "the tag $tag exists here (at $(git rev-parse --short=12 "$tag^{}")), though not on $remote: git tag -d $tag, or move it with -f"
  fi
}

check_identity() { # git asks for it when the commit or the tag is made, and that is too late
  local one
  for one in GIT_AUTHOR_IDENT GIT_COMMITTER_IDENT; do
    git var "$one" >/dev/null 2>&1 && continue
    problem 'git does not know who you are: git config user.name "Your Name" && git config user.email you@example.com'
    return
  done
}

# What the release commit changes: whole files, with a dot behind them, since $(…) drops the newlines at the end.
old_source='' new_source='' old_changelog='' new_changelog=''
has_entries=no # under Unreleased

plan_commit() {
  old_source=$(cat "$VERSION_FILE" && echo .)
  new_source=$old_source
  if [[ $version != "$source_version" ]]; then
    new_source=$(sed "s/^__version__ = \"[^\"]*\"\([[:space:]]*\)\$/__version__ = \"$version\"\1/" "$VERSION_FILE" && echo .)
  fi
  if ! new_changelog=$(scripts/release-notes "$version" --released "$today" 2>/dev/null && echo .); then
    problem "$(scripts/release-notes "$version" --released "$today" 2>&1 >/dev/null | sed 's/^release-notes: //')"
    old_changelog='' new_changelog=''
    return
  fi
  old_changelog=$(cat "$CHANGELOG" && echo .)
  if scripts/release-notes Unreleased >/dev/null 2>&1; then has_entries=yes; fi
  if [[ $new_changelog != "$old_changelog" ]]; then
    notes=$(scripts/release-notes "$version" --changelog /dev/stdin <<<"${new_changelog%.}")
    [[ $has_entries == yes ]] ||
      note "CHANGELOG.md has nothing under \"Unreleased\": the notes of $version say that nothing has changed that users notice"
    return
  fi
  if ! notes=$(scripts/release-notes "$version" 2>&1); then
    problem "${notes#release-notes: }"
    notes=''
  fi
  if [[ $has_entries == yes ]]; then
    note "CHANGELOG.md has entries under \"Unreleased\": they are part of this release, though not of the notes of $version"
  fi
}

needs_commit() { [[ $new_source != "$old_source" || $new_changelog != "$old_changelog" ]]; }

check_nothing_is_under_way() { # git would make the release commit a part of it
  local one
  for one in MERGE_HEAD CHERRY_PICK_HEAD REVERT_HEAD; do
    ! git rev-parse --verify --quiet "$one" >/dev/null ||
      problem "a merge, cherry-pick or revert is under way here ($one): finish it, or give it up (git status says how)"
  done
}

show_plan() {
  local one to
  say "A dry run: nothing is changed. A release of img-serving $version would"
  if needs_commit; then
    echo "  - make the commit \"Release $version\" on ${branch:-no branch}, after ${head:0:12} ($(git log -1 --format=%s)):"
    if [[ $new_source != "$old_source" ]]; then
      echo "      $VERSION_FILE: __version__ = \"$source_version\" becomes \"$version\""
    fi
    if [[ $new_changelog != "$old_changelog" && $has_entries == no ]]; then
      echo "      $CHANGELOG: a new section, \"## [$version] - $today\", says that nothing has changed that users notice"
    elif [[ $new_changelog != "$old_changelog" ]]; then
      echo "      $CHANGELOG: what is under \"## [Unreleased]\" goes below a new heading, \"## [$version] - $today\""
    fi
  fi
  if [[ -n $local_tag ]]; then echo "  - replace the tag $tag here (now at $(git rev-parse --short=12 "$tag^{}"))"; fi
  if needs_commit; then
    echo "  - make the annotated tag $tag of that commit"
  else
    echo "  - make the annotated tag $tag of ${head:0:12} (${branch:-no branch}: $(git log -1 --format=%s))"
  fi
  if [[ -n $remote_tag ]]; then echo "  - replace the tag $tag on $remote (now at ${remote_tag_commit:0:12})"; fi
  if [[ -n $remote ]]; then
    to="$remote ($(git remote get-url --push "$remote" | without_userinfo))"
    if [[ -z $branch ]] || ! pushes_branch; then
      echo "  - push it to $to"
    else
      echo "  - push $branch and the tag together, both or neither, to $to${not_there:+, $not_there}"
    fi
  fi
  echo "  - so that GitHub publishes the image $IMAGE:$(scripts/image-tags "$version" | paste -sd ' ' | sed 's/ /, :/g') and a release${notes:+ with these notes:}"
  if [[ -n $notes ]]; then printf '    | %s\n' "${notes//$'\n'/$'\n    | '}"; fi
  if [[ ${#problems[@]} -gt 0 ]]; then
    for one in "${problems[@]}"; do complain "would be refused: $one"; done
    exit "$REFUSED"
  fi
  say "Nothing is in the way."
}

written=no pushing=no # how far it has come, for put_back
stopped='' # the exit status of a signal that came while something was made

hold_signals() { # until what is being made has an id that is known
  trap 'stopped=129' HUP
  trap 'stopped=130' INT
  trap 'stopped=143' TERM
}

heed_signals() {
  trap 'exit 129' HUP
  trap 'exit 130' INT
  trap 'exit 143' TERM
  [[ -z $stopped ]] || exit "$stopped"
}

put_back() { # at any exit that is no success: the tag, the branch and the files are as they were; what others made stays
  local status=$? at_tag at left=''
  trap '' HUP INT TERM
  trap - EXIT
  at_tag=$(git rev-parse --verify --quiet "refs/tags/$tag" || true)
  if [[ $at_tag == "$local_tag" ]]; then
    :
  elif [[ -z $made_tag || $at_tag != "$made_tag" ]]; then
    left="the tag $tag is no longer what it was, and not of this run: it was left"
  elif [[ -n $local_tag ]]; then
    git update-ref "refs/tags/$tag" "$local_tag" "$made_tag" || left="the tag $tag is still moved: git tag -f $tag ${local_tag:0:12}"
  else
    git update-ref -d "refs/tags/$tag" "$made_tag" || left="the tag $tag is still here: git tag -d $tag"
  fi
  if [[ $written == yes ]]; then
    at=$(git rev-parse --verify --quiet HEAD || true)
    if [[ $at == "$head" ]]; then
      if ! { printf '%s' "${old_source%.}" >"$VERSION_FILE" && printf '%s' "${old_changelog%.}" >"$CHANGELOG" && git reset --quiet; }; then
        left+="${left:+; }$VERSION_FILE and $CHANGELOG are changed: git checkout HEAD $VERSION_FILE $CHANGELOG"
      fi
    elif [[ -z $made_commit || $at != "$made_commit" ]]; then
      left+="${left:+; }$branch is at ${at:0:12}, which is not of this run: it was left, as were the files"
    else
      # --keep: what somebody has changed meanwhile in other files stays
      git reset --quiet --keep "$head" ||
        left+="${left:+; }the commit ${at:0:12} is still on $branch: git reset --keep ${head:0:12}"
    fi
    changes=$(git status --porcelain --untracked-files=normal --ignore-submodules=none || true)
    if [[ -n $changes && -z $left ]]; then note "a hook, or somebody, has changed more, and that was left: $(summary_of_changes)"; fi
  fi
  if [[ -n $left ]]; then complain "not everything could be put back: $left"; else note "$branch, its files and the tags here are as before"; fi
  if [[ $pushing == yes ]]; then note "whether the push arrived is not known: git ls-remote $shown $tag"; fi
  exit "$status"
}

make_commit() {
  written=yes
  # written into the files that are there, so that their modes stay
  if ! { printf '%s' "${new_source%.}" >"$VERSION_FILE" && printf '%s' "${new_changelog%.}" >"$CHANGELOG"; }; then
    die "$FAILED" "$VERSION_FILE and $CHANGELOG could not be written"
  fi
  hold_signals
  # what git or a hook leaves running should not hold the lock (9)
  if ! { git add -- "$VERSION_FILE" "$CHANGELOG" && git commit --quiet --message "Release $version" 9>&-; }; then
    heed_signals
    die "$FAILED" "git could not make the commit \"Release $version\"; nothing was pushed"
  fi
  commit=$(git rev-parse --verify HEAD)
  [[ $(git rev-parse --verify --quiet "$commit^") != "$head" ]] || made_commit=$commit
  heed_signals
}

make_tag() { # FORCE; the notes' headings begin with #, which git would take for comments
  local options=(--annotate --cleanup=whitespace --file=-)
  [[ $1 == no ]] || options+=(--force)
  hold_signals
  if ! printf 'img-serving %s\n\n%s\n' "$version" "$notes" | git tag "${options[@]}" "$tag" "$commit" >/dev/null 9>&-; then
    heed_signals
    die "$FAILED" "git could not make the tag $tag; nothing was pushed"
  fi
  made_tag=$(git rev-parse --verify "refs/tags/$tag")
  heed_signals
}

pushes_branch() { needs_commit || [[ -n $not_there ]]; }

push() { # FORCE
  local options=() what=("refs/tags/$tag:refs/tags/$tag") said there
  if pushes_branch; then
    options+=(--atomic)
    what+=("refs/heads/$branch:$remote_branch")
  fi
  # a tag that somebody else has moved since we looked stays where it is
  [[ $1 == no ]] || options+=("--force-with-lease=refs/tags/$tag:$remote_tag")
  pushing=yes
  trap : HUP INT TERM # they end git, and what the remote then has decides how this ends
  if ! git push --quiet "${options[@]}" "$remote" "${what[@]}" 2>&1 9>&- | without_userinfo >&2; then
    # a connection may break after the remote has taken everything
    if said=$(git ls-remote "$asked" "refs/tags/$tag" 2>/dev/null); then
      there=${said%%[[:space:]]*}
      pushing=no
      [[ $there != "$made_tag" ]] || return 0
    fi
    die "$FAILED" "$pushed could not be pushed to $remote"
  fi
  pushing=no
}

release() { # VERSION FORCE DRY
  local version=$1 force=$2 dry=$3 source_version tag notes='' today commit pushed
  need git "install it (Debian, Ubuntu: apt install git)"
  need python3 "it reads and writes CHANGELOG.md (Debian, Ubuntu: apt install python3)"
  git rev-parse --is-inside-work-tree >/dev/null 2>&1 || die "$REFUSED" "refused: $PWD is no git repository: a release is a tag"
  if [[ $dry == no ]]; then lock; fi # before anything is looked at
  source_version=$(scripts/project-version) || exit "$FAILED"
  version=${version:-$source_version}
  scripts/image-tags "$version" >/dev/null || exit "$MISUSED"
  tag=v$version
  today=$(date +%Y-%m-%d) # where the maintainer is, as in the commit
  check_version
  read_changes
  if [[ -n $changes ]]; then
    problem "there are changes that no commit has ($(summary_of_changes)): commit them, or put them away (git stash -u)"
  fi
  find_branch
  ask_remote
  check_tag "$force"
  check_identity
  plan_commit
  if needs_commit; then check_nothing_is_under_way; fi

  if [[ $dry == yes ]]; then
    show_plan
    return
  fi
  refuse_if_any
  commit=$head pushed="the tag $tag"
  if pushes_branch; then pushed="$branch and $tag"; fi
  trap put_back EXIT
  heed_signals
  if needs_commit; then make_commit; fi
  make_tag "$force"
  push "$force"
  trap - EXIT HUP INT TERM
  if pushes_branch; then
    say "Pushed $branch and $tag (${commit:0:12}) together to $remote: GitHub builds and publishes it now."
  else
    say "Pushed $tag (${commit:0:12}) to $remote: GitHub builds and publishes it now."
  fi
}

# --- direct -----------------------------------------------------------------------------------------------------------

username='' token='' session=''

value_in_env_file() { # NAME: sets REPLY to its last value in .env, or to nothing. The file is data: no part of it is executed
  local - line value before number=0
  { set +x; } 2>/dev/null
  REPLY=
  [[ -e .env ]] || return 0
  [[ -f .env && -r .env ]] || die "$LACKING" ".env cannot be read: it should be a file that you own (chmod 600 .env)"
  while IFS= read -r line || [[ -n $line ]]; do
    number=$((number + 1))
    line=${line%$'\r'}
    [[ $number -gt 1 ]] || line=${line#$'\xef\xbb\xbf'}
    [[ $line =~ ^[[:space:]]*(export[[:space:]]+)?$1[[:space:]]*=([[:space:]]*)(.*)$ ]] || continue
    before=${BASH_REMATCH[2]} value=${BASH_REMATCH[3]}
    case $value in
      \"*)
        [[ $value =~ ^\"(([^\"\\]|\\.)*)\"[[:space:]]*(#.*)?$ ]] ||
          die "$MISUSED" ".env, line $number: what follows $1= begins with \" and should end with it"
        unescape "${BASH_REMATCH[1]}"
        ;;
      \'*)
        [[ $value =~ ^\'([^\']*)\'[[:space:]]*(#.*)?$ ]] ||
          die "$MISUSED" ".env, line $number: what follows $1= begins with ' and should end with it"
        REPLY=${BASH_REMATCH[1]}
        ;;
      *)
        value=$before$value
        value=${value%%[[:space:]]#*}
        value=${value#"${value%%[![:space:]]*}"}
        REPLY=${value%"${value##*[![:space:]]}"}
        ;;
    esac
  done <.env
}

unescape() { # TEXT: sets REPLY to it with \" \\ \$ \` as in a shell's double quotes
  local rest=$1
  REPLY=
  while [[ $rest =~ ^([^\\]*)\\(.)(.*)$ ]]; do
    REPLY+=${BASH_REMATCH[1]}
    [[ ${BASH_REMATCH[2]} == [\"\\\$\`] ]] || REPLY+=\\
    REPLY+=${BASH_REMATCH[2]}
    rest=${BASH_REMATCH[3]}
  done
  REPLY+=$rest
}

read_credentials() { # no trace (bash -x) may show the token, nor does any program but `docker login` get it
  local - mode
  { set +x; } 2>/dev/null
  username=${DOCKER_HUB_USERNAME:-} token=${DOCKER_HUB_TOKEN:-}
  unset DOCKER_HUB_TOKEN
  if [[ -z $username ]]; then value_in_env_file DOCKER_HUB_USERNAME; username=$REPLY; fi
  if [[ -z $token ]]; then
    value_in_env_file DOCKER_HUB_TOKEN
    token=$REPLY
    if [[ -n $token ]] && mode=$(stat -Lc %a .env) && [[ $mode != *00 ]]; then note ".env holds a token and others may read it: chmod 600 .env"; fi
  fi
}

check_username() { # without showing it: where the two were swapped, it is the token
  local -
  local unseen="DOCKER_HUB_USERNAME, which is not shown here,"
  { set +x; } 2>/dev/null
  # a Docker ID has 4 to 30 characters, and a token more: dckr_pat_…, or a UUID formerly
  if [[ $username == dckr_* || ${#username} -gt 30 ]]; then
    die "$MISUSED" "$unseen looks like an access token: it should be the name in your images' names, which has 30 characters at most"
  elif ! [[ $username =~ ^([a-z0-9][a-z0-9_-]*)?$ ]]; then
    die "$MISUSED" "$unseen is no name that images have: it should be in lower case, without blanks, and not an e-mail address"
  fi
}

check_credentials() {
  local - lacking=no
  { set +x; } 2>/dev/null
  if [[ -z $username ]]; then
    complain "DOCKER_HUB_USERNAME is not set: put it into .env (cp .env.example .env) or into the environment"
    lacking=yes
  fi
  if [[ -z $token ]]; then
    complain "DOCKER_HUB_TOKEN is not set: make an access token with read and write rights at Docker Hub, and put it into .env or into the environment"
    lacking=yes
  fi
  [[ $lacking == no ]] || exit "$LACKING"
}

log_out() {
  [[ -n $session ]] || return 0
  DOCKER_CONFIG=$session docker logout >/dev/null 2>&1 || true
  rm -rf "$session"
  session=
}

log_in() { # into a configuration of its own, so that ~/.docker/config.json and the keyring stay as they are
  local - said own=${DOCKER_CONFIG:-${HOME:-}/.docker} part
  { set +x; } 2>/dev/null
  session=$(mktemp -d)
  trap log_out EXIT
  trap 'exit 129' HUP
  trap 'exit 130' INT
  trap 'exit 143' TERM
  # docker uses a machine's keyring where its configuration names no registry
  printf '{"auths": {"nowhere.invalid": {}}}\n' >"$session/config.json"
  for part in contexts cli-plugins; do # what says where the engine is, and the user's plug-ins
    if [[ -d $own/$part ]]; then ln -s "$(cd "$own/$part" && pwd)" "$session/$part"; fi
  done
  if ! said=$(printf '%s' "$token" | DOCKER_CONFIG=$session docker login --username "$username" --password-stdin 2>&1); then
    printf '%s\n' "${said//"$token"/***}" >&2
    die "$FAILED" "the login to Docker Hub as $username failed; if it was not the network: DOCKER_HUB_TOKEN should be an access token of this account that has not expired"
  fi
  token=
}

direct() { # VERSION BUILD-ONLY
  local version=$1 build_only=$2 source_version tags names=() options=() one revision=unknown context pushed=''
  source_version=$(scripts/project-version) || exit "$FAILED"
  version=${version:-$source_version}
  tags=$(scripts/image-tags "$version") || exit "$MISUSED"
  need docker "install Docker Engine, or let GitHub build: scripts/deploy.sh release"
  read_credentials
  check_username # also where it only names what is built
  if [[ $build_only == no ]]; then check_credentials; fi
  if [[ $version != "$source_version" ]]; then
    note "the image is tagged $version, and the program in it will say $source_version (src/img_serving/__init__.py)"
  fi
  if git rev-parse --is-inside-work-tree >/dev/null 2>&1 && revision=$(git rev-parse --verify --quiet HEAD); then
    read_changes
    if [[ -n $changes && $build_only == yes ]]; then
      note "built of changes that no commit has ($(summary_of_changes)): its revision is said to be dirty"
      revision+=-dirty
    elif [[ -n $changes ]]; then
      problem "there are changes that no commit has ($(summary_of_changes)): commit them, put them away (git stash -u), or build without pushing (-b)"
    fi
  else
    note "this is no git repository with a commit: the image will not say of which one it is"
    revision=unknown
  fi
  refuse_if_any

  for one in $tags; do names+=("${username:+$username/}$IMAGE:$one"); done
  for one in "${names[@]}"; do options+=(--tag "$one"); done
  if [[ $build_only == no ]]; then
    log_in # before the build: a wrong token should not cost one
    options+=(--pull)
  fi
  say "Building ${names[*]}"
  docker build "${options[@]}" \
    --build-arg "VERSION=$version" --build-arg "REVISION=$revision" --build-arg "CREATED=$(date -u +%Y-%m-%dT%H:%M:%SZ)" . ||
    die "$FAILED" "the image could not be built; nothing was pushed"
  if [[ $build_only == yes ]]; then
    say "Built, and not pushed: ${names[*]}"
    return
  fi
  # the engine that the build used, whose choice is in the user's own configuration
  context=$(docker context inspect --format '{{.Name}}' 2>/dev/null || true) # `context show` is newer
  if [[ -n $context && $context != default ]]; then export DOCKER_CONTEXT=$context; fi
  for one in "${names[@]}"; do
    say "Pushing $one"
    DOCKER_CONFIG=$session docker push "$one" ||
      die "$FAILED" "$one could not be pushed; pushed before it: ${pushed:-nothing}"
    pushed+="${pushed:+ }$one"
  done
  say "Pushed: $pushed"
}

# --- the command line -------------------------------------------------------------------------------------------------

main() {
  local mode='' version='' build_only=no dry=no force=no
  while [[ $# -gt 0 ]]; do
    case $1 in
      -h | --help) usage; exit 0 ;;
      -v | --version)
        [[ $# -ge 2 && -n $2 ]] || misuse "$1 needs a version, such as 1.2.3"
        version=${2#v}
        shift
        ;;
      --version=?*) version=${1#*=} version=${version#v} ;;
      -b | --build-only) build_only=yes ;;
      -d | --dry-run) dry=yes ;;
      -f | --force) force=yes ;;
      direct | release)
        [[ -z $mode ]] || misuse "one mode at a time: $mode or $1"
        mode=$1
        ;;
      *) misuse "\"$1\" is neither a mode (direct, release) nor an option" ;;
    esac
    shift
  done
  case $mode in
    release)
      [[ $build_only == no ]] || misuse "-b is an option of direct, not of release"
      release "$version" "$force" "$dry"
      ;;
    direct)
      [[ $dry == no ]] || misuse "-d is an option of release, not of direct (direct -b builds and pushes nothing)"
      [[ $force == no ]] || misuse "-f is an option of release, not of direct (direct replaces its tags anyway)"
      direct "$version" "$build_only"
      ;;
    *)
      complain "say what to do: direct or release"
      usage >&2
      exit "$MISUSED"
      ;;
  esac
}

main "$@"

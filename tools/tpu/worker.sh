#!/usr/bin/env bash
# Runs on each worker (setup.sh starts it): Python, jaxpost with its TPU packages, storage. May be run again at any time.
#   worker.sh [nfs HOST:/PATH | bucket BUCKET]
set -euo pipefail
cd ~/jaxpost
# The VMs' own Python is too old; uv brings one.
python3 -m pip install --quiet --user uv
UV=$(python3 -m site --user-base)/bin/uv
[ -x .venv/bin/python ] || "$UV" venv --quiet --python 3.12 .venv
"$UV" pip install --quiet --python .venv/bin/python -c locks/py312.txt -e '.[tpu]'

# A VM updates itself after it starts; apt waits for that instead of failing.
install() { sudo apt-get -o DPkg::Lock::Timeout=600 install -y -qq "$@" >/dev/null; }

mkdir -p ~/shared
if [ $# = 2 ] && ! mountpoint -q ~/shared; then
  case $1 in
    nfs)
      install nfs-common
      sudo mount -t nfs -o hard "$2" ~/shared
      sudo chmod 777 ~/shared
      ;;
    bucket)
      if ! command -v gcsfuse >/dev/null; then
        curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee /usr/share/keyrings/cloud.google.asc >/dev/null
        echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
          sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
        sudo apt-get -o DPkg::Lock::Timeout=600 update -qq
        install gcsfuse
      fi
      # A finished checkpoint is renamed: let folders of many files be renamed, and see what other workers wrote.
      gcsfuse --implicit-dirs --rename-dir-limit 200000 --metadata-cache-ttl-secs 0 "$2" ~/shared
      ;;
    *) echo "worker.sh: storage is nfs or bucket, not $1" >&2 && exit 2 ;;
  esac
fi
echo "$(hostname): $(.venv/bin/jaxpost --version) is installed"

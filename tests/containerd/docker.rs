//! Docker with containerd's image store, which keeps images and containers in the snapshotter that its `storage-driver` names.

use super::{
    TOOLS,
    debian::{DRIVERS, Debian, asked_for},
    ground, home_with_image,
};

/// Without a network: bridges and packet filters are none of the snapshotter's business.
const DOCKER: &str = r#"
# The differ, too, and calls in the log.
differ='/graphdriver-diff\]/,/walking/ s/^# //' debug=--debug
up
mkdir docker
cat > docker/daemon.json <<JSON
{
  "features": { "containerd-snapshotter": true },
  "storage-driver": "graphdriver",
  "containerd": "$PWD/cd/sock",
  "containerd-namespace": "$CONTAINERD_NAMESPACE",
  "cgroup-parent": "/$CONTAINERD_NAMESPACE",
  "hosts": ["unix://$PWD/docker/sock"],
  "data-root": "$PWD/docker/root", "exec-root": "$PWD/docker/exec", "pidfile": "$PWD/docker/pid",
  "bridge": "none", "iptables": false, "ip6tables": false
}
JSON
export DOCKER_HOST=unix://$PWD/docker/sock
setpriv --pdeathsig TERM dockerd --config-file docker/daemon.json > docker/log 2>&1 &
dockerd=$!
until_true docker version
docker info --format '{{.Driver}} {{index .DriverStatus 0 1}}'
docker load -qi "$ARCHIVE"
run() { docker run --network none "$@"; }
run --name first busybox:1 /bin/sh -c \
    '. /etc/os-release; echo "$ID"; echo from first > /written; rm /usr/share/doc/gone; chmod 700 /opt'
docker diff first | sort | paste -sd ' '
diffs() { sed 's/\x1b\[[0-9;]*m//g' service.log | grep -c 'method="Diff".* done' || :; }
echo "diffs $(diffs)"
docker commit first committed > /dev/null
echo "diffs $(diffs)"
run --name second committed /bin/sh -c 'cat /written; ls /usr/share/doc; stat -c %a /opt; echo from second > /written'
docker start -a second | tail -n 1

run -d --name beats committed /bin/sh -c 'while :; do echo beat >> /beats; sleep 0.1; done' > /dev/null
beats() { docker exec beats grep -c beat /beats; }
until_true beats
kill -KILL $service; wait $service || :
before=$(beats)
service
until_true sn info "$(docker inspect -f '{{.Id}}' beats)"
more() { (($(beats) > before)); }
until_true more && echo "goes on"
docker cp second:/written - | tar -xO
# Of a container that runs Docker copies and commits through a mount of its own.
docker cp beats:/written - | tar -xO
docker diff beats | grep -x 'A /beats'
docker commit beats running > /dev/null
docker run --rm --network none running /bin/sh -c 'grep -c beat /beats > /dev/null && echo "committed while it ran"'
docker rmi running > /dev/null
echo copied > copied
docker cp -q copied beats:/copied
docker exec beats cat /copied

# BuildKit has keys of its own for snapshots, and mounts them.
cat > docker/Dockerfile <<'FILE'
FROM busybox:1
RUN . /etc/os-release; rm -r /usr/share/doc; echo "built on $ID" > /built
COPY copied /
RUN [ ! -e /usr/share/doc ] && cat /copied >> /built
FILE
cp copied docker/copied
docker build -q --network none -t built -f docker/Dockerfile docker > /dev/null 2> docker/build || cat docker/build
docker run --rm --network none built /bin/sh -c 'cat /built'
docker rmi built > /dev/null
docker builder prune -af > /dev/null

graphdriver mounts | grep -c "$(docker inspect -f '{{.Id}}' beats)"
docker rm -f first second beats > /dev/null
docker rmi committed busybox:1 > /dev/null
nothing() { graphdriver info | grep -q '^Layers: 0$'; }
until_true nothing
graphdriver check > /dev/null
echo "left $(sn ls | tail -n +2 | wc -l)"
"#;

fn docker_on(debian: &Debian, driver: &str) {
    let said = home_with_image().ok_noisy(&format!(
        "export GRAPHDRIVER_STORAGE_DRIVER={driver} ARCHIVE=image.tar\n{TOOLS}\n{}\n{}\n{DOCKER}",
        debian.enter(),
        ground(driver)
    ));
    let told = "graphdriver io.containerd.snapshotter.v1\nLoaded image: busybox:1\ndebian\n\
                A /written C /opt C /usr C /usr/share C /usr/share/doc D /usr/share/doc/gone\n\
                diffs 0\ndiffs DIFFS\nfrom first\n700\n700\ngoes on\nfrom second\n";
    let diffs = if driver == "vfs-fuse" { "0" } else { "1" };
    let running = "from first\nA /beats\ncommitted while it ran\ncopied\nbuilt on debian\ncopied";
    assert_eq!(said, format!("{}{running}\n1\nleft 0\n", told.replace("DIFFS", diffs)));
}

fn docker_of(test: &str, suite: &str) {
    let Some(debian) = asked_for(test, suite) else { return };
    for driver in DRIVERS {
        docker_on(&debian, driver);
    }
}

#[test]
fn docker_of_trixie() {
    docker_of("docker_of_trixie", "trixie");
}

#[test]
fn docker_of_sid() {
    docker_of("docker_of_sid", "sid");
}

//! What to put into containerd's configuration.

use std::path::Path;

/// A stanza for `config.toml` that makes containerd use the service at `socket`, with its data under `root`.
pub fn containerd_config(socket: &Path, root: &Path) -> String {
    let (socket, root) = (quoted(socket), quoted(root));
    format!(
        r#"# For a file that /etc/containerd/config.toml imports: imports = ["/etc/containerd/conf.d/*.toml"]
# For containerd 1.6 to 2.x: none minds the plugins that it has not got.
version = 2

[proxy_plugins.graphdriver]
  type = "snapshot"
  address = {socket}
  # Read since containerd 2.0: it need not change owners for user namespaces.
  capabilities = ["remap-ids", "multi-remap-ids"]
  # Read since containerd 1.7.
  [proxy_plugins.graphdriver.exports]
    root = {root}

# The tars of commits by what the driver knows, instead of a look at all files. For containerd 1.7 and later: 1.6 does not
# start with it. The service has to find containerd's socket: --containerd ADDRESS.
# All of containerd's diffs and unpacking, of other snapshotters too, go through the service's socket then. What is not ours to do
# containerd asks "walking" for next; while nobody serves the socket, it gets no answer and fails.
# [proxy_plugins.graphdriver-diff]
#   type = "diff"
#   address = {socket}
# [plugins."io.containerd.service.v1.diff-service"]
#   default = ["graphdriver-diff", "walking"]

# For Kubernetes, with containerd 1 and 2. An imported file of version 2 is not migrated to 3.
[plugins."io.containerd.grpc.v1.cri".containerd]
  snapshotter = "graphdriver"
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "graphdriver"

# What containerd 2 may unpack images into when they are pulled or imported. This replaces a list in a file imported before,
# and overlayfs is what is in it by default.
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
  platform = "linux"
  snapshotter = "overlayfs"
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
  platform = "linux"
  snapshotter = "graphdriver"
"#
    )
}

/// A basic string of TOML.
fn quoted(path: &Path) -> String {
    let text = path.to_string_lossy();
    let escaped: String = text
        .chars()
        .map(|c| match c {
            '"' | '\\' => format!("\\{c}"),
            c if c.is_control() => format!("\\u{:04X}", u32::from(c)),
            c => c.to_string(),
        })
        .collect();
    format!("\"{escaped}\"")
}

//! What to put into containerd's configuration.

use std::path::Path;

/// A stanza for `config.toml` that makes containerd use the service at `socket`, with its data under `root`.
pub fn containerd_config(socket: &Path, root: &Path) -> String {
    let (socket, root) = (quoted(socket), quoted(root));
    format!(
        r#"# For a file that /etc/containerd/config.toml imports: imports = ["/etc/containerd/conf.d/*.toml"]
# Version 2 for containerd 1.6 and 1.7, version 3 for 2.x.
version = 2

[proxy_plugins.graphdriver]
  type = "snapshot"
  address = {socket}
  # Read since containerd 2.0: it need not change owners for user namespaces.
  capabilities = ["remap-ids", "multi-remap-ids"]
  # Read since containerd 1.7.
  [proxy_plugins.graphdriver.exports]
    root = {root}

# For Kubernetes:
[plugins."io.containerd.grpc.v1.cri".containerd]
  snapshotter = "graphdriver"

# With version = 3 in place of the stanza above:
#[plugins."io.containerd.cri.v1.images"]
#  snapshotter = "graphdriver"
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

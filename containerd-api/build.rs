//! Generates the messages and the services. protox reads the definitions, so that no protoc has to be installed.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let definition = protox::compile(["snapshots.proto", "diff.proto", "content.proto", "leases.proto"], ["proto"])?;
    // Whoever uses the client brings the transport.
    let configured = tonic_prost_build::configure().build_transport(false).btree_map(".");
    configured.include_file("packages.rs").compile_fds(definition)?;
    Ok(())
}

//! Generates the messages and the service. protox reads the definition, so that no protoc has to be installed.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let definition = protox::compile(["proto/snapshots.proto"], ["proto"])?;
    // Whoever uses the client brings the transport.
    let configured = tonic_prost_build::configure().build_transport(false).btree_map(".");
    configured.include_file("packages.rs").compile_fds(definition)?;
    Ok(())
}

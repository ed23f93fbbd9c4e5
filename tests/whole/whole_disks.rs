//! Whether a disk is about to be shipped whole, as `status` says.

use crate::common::Host;

/// Fails if a disk of the VM must be shipped or compared whole.
pub fn no_disk_is_whole(host: &Host, vm: &str) {
    let status = host.vm(vm);
    for disk in status["disks"].as_array().expect("disks") {
        assert!(
            disk["whole_because"].is_null(),
            "{} is shipped whole: {}",
            disk["path"],
            disk["whole_because"]
        );
    }
}

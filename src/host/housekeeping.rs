//! What must be looked after now and then, by a thread of its own: mounts that somebody removed,
//! followed folders, definitions of VMs.

use std::sync::Arc;
use std::time::Duration;

use super::engine::Engine;

/// Mounts are looked after so often.
const TICK: Duration = Duration::from_secs(2);
/// Followed folders are looked through whole every so many ticks (a rename is told at once).
const FOLDERS_TICKS: u64 = 30;
/// Definitions are asked for again every so many ticks.
const DEFINITIONS_TICKS: u64 = 150;

impl Engine {
    pub(super) fn housekeeping_loop(self: &Arc<Self>) {
        let mut tick: u64 = 0;
        loop {
            self.look_after_mounts();
            if tick.is_multiple_of(FOLDERS_TICKS) {
                self.note_followed_folders();
            }
            if tick.is_multiple_of(DEFINITIONS_TICKS) {
                for vm in self.vms().iter().filter(|v| v.running().is_some()) {
                    self.refresh_definition(vm);
                    if self.is_stopping() {
                        return;
                    }
                }
            }
            tick += 1;
            if self.pause_or_stop(TICK) {
                return;
            }
        }
    }
}

//! One suite, three backends: the simulated domain, a real QEMU behind QMP, and a domain of a real
//! libvirtd. Each behaviour is one function that does not know which of them it meets; what they cannot
//! do alike is in one table, in `behaviour/world.rs`, and what one of them cannot do must be refused
//! with an errno and a sentence. Everything goes through the kernel.
//!
//! In the end of every story the domain is as it was, but for checkpoints, and no file is left.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

#[path = "behaviour/story.rs"]
mod story;
#[path = "behaviour/world.rs"]
mod world;
#[path = "behaviour/worlds/mod.rs"]
mod worlds;

#[path = "behaviour/backups.rs"]
mod backups;
#[path = "behaviour/checkpoints.rs"]
mod checkpoints;
#[path = "behaviour/documents.rs"]
mod documents;
#[path = "behaviour/lives.rs"]
mod lives;
#[path = "behaviour/push.rs"]
mod push;
#[path = "behaviour/slices.rs"]
mod slices;
#[path = "behaviour/tree.rs"]
mod tree;

/// Makes a module of tests for each world. The simulated one lives in the test's own process, which cannot be
/// killed, and writes to no targets.
macro_rules! suite {
    ($($theme:ident { $($behaviour:ident)+ })+ ; and with a real QEMU:
     $($real_theme:ident { $($real:ident)+ })+) => {
        mod sim {
            $($(#[test]
            fn $behaviour() {
                crate::story::tell(crate::worlds::sim::world(), crate::$theme::$behaviour);
            })+)+
        }
        suite!(@real qmp { $($theme { $($behaviour)+ })+ $($real_theme { $($real)+ })+ });
        #[cfg(feature = "libvirt")]
        suite!(@real libvirt { $($theme { $($behaviour)+ })+ $($real_theme { $($real)+ })+ });
    };
    (@real $world:ident { $($theme:ident { $($behaviour:ident)+ })+ }) => {
        mod $world {
            $($(#[test]
            fn $behaviour() {
                crate::story::tell(crate::worlds::$world::world(), crate::$theme::$behaviour);
            })+)+
        }
    };
}

suite! {
    tree {
        the_tree_has_one_shape
        what_the_tree_does_not_have
    }
    checkpoints {
        checkpoints_lead_to_each_other
        whatever_is_deleted_no_change_is_lost
        renaming
        forgotten_and_taken_up_again
        documents_of_checkpoints
        coarser_bitmaps
    }
    backups {
        nights_of_random_writes
        images_make_a_chain
        an_existing_checkpoint_is_used
        two_at_once
        what_a_running_backup_needs_stays
        an_end_is_told
        without_checkpoints
    }
    documents {
        some_disks_since_an_older_checkpoint
        a_backup_that_makes_no_checkpoint
        documents_that_cannot_be
        a_server_for_others
    }
    slices {
        unchanged_slices_keep_their_times
    }
    push {
        what_is_written_is_the_instant
        a_push_is_steered
    }
    lives {
        an_unmount_ends_what_runs
        a_domain_that_ends_and_comes_back
        a_hung_domain_is_no_hung_mount
        a_killed_domain_breaks_its_history
        a_resized_disk_breaks_its_history
        somebody_else_has_what_is_needed
    }
    ; and with a real QEMU:
    push {
        what_is_there_is_never_written_over
    }
    lives {
        killed_with_a_backup_running
    }
}

package netns_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"syscall"

	"golang.org/x/sys/unix"
)

// A fault is what happens to one system call of the plugin's, the nth of those
// in calls, counted over all its threads. strace could do it too, but counts
// for each thread anew, and a Go program moves between threads as it likes.
type fault struct {
	calls []uint64
	nth   int           // 0 for none: the calls are counted only
	errno syscall.Errno // the call is not made and returns this; 0 kills the process instead
}

// A tracer watches one process, from the thread that started it.
type tracer struct {
	fault
	pid     int
	count   int          // of the calls so far
	inCall  map[int]bool // by thread: between the entry and the exit of a call
	failing int          // the thread whose call is to return errno; 0 for none
}

// runTraced runs a launch with a fault and tells how many of the calls there
// were; with fewer than nth the fault did not happen.
func (l launch) runTraced(dir string, f fault) (r result, count int, err error) {
	tr := &tracer{fault: f, inCall: map[int]bool{}}
	err = onThread(func() (err error) {
		r, err = tr.run(l, dir)
		return err
	})
	return r, tr.count, err
}

func (tr *tracer) run(l launch, dir string) (r result, err error) {
	files := make([]*os.File, 3)
	for i, name := range []string{"stdin", "stdout", "stderr"} {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, []byte([]string{l.stdin, "", ""}[i]), 0o600); err != nil {
			return r, err
		}
		if files[i], err = os.OpenFile(file, os.O_RDWR, 0); err != nil {
			return r, err
		}
		defer files[i].Close()
	}
	var env []string
	for k, v := range l.env {
		env = append(env, k+"="+v)
	}
	p, err := os.StartProcess(lab.plugin, []string{lab.plugin}, &os.ProcAttr{Files: files, Env: env, Sys: &syscall.SysProcAttr{Ptrace: true, Setpgid: true}})
	if err != nil {
		return r, fmt.Errorf("starting the plugin to be traced: %w", err)
	}
	defer p.Release()
	tr.pid = p.Pid
	r.exit, err = tr.watch()
	if err != nil {
		p.Kill()
		return r, err
	}
	out, err1 := os.ReadFile(files[1].Name())
	errOut, err2 := os.ReadFile(files[2].Name())
	r.stdout, r.stderr = string(out), string(errOut)
	if r.exit != 0 {
		r.cniErr = parseCNIError(r.stdout)
	}
	return r, errors.Join(err1, err2)
}

// watch lets the process run from one stop to the next until it ends.
func (tr *tracer) watch() (exit int, err error) {
	for started := false; ; {
		var status unix.WaitStatus
		// Of its process group only: other children of this program are not ours
		// to reap, and may have become this thread's when the one that started
		// them ended.
		tid, err := unix.Wait4(-tr.pid, &status, unix.WALL|unix.WNOTHREAD, nil)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return 0, fmt.Errorf("waiting for the traced plugin: %w", err)
		}
		switch {
		case status.Exited() || status.Signaled():
			if tid == tr.pid {
				return status.ExitStatus(), nil // -1 when it was killed
			}
			continue
		case !started:
			started = true
			if err := unix.PtraceSetOptions(tid, unix.PTRACE_O_TRACESYSGOOD|unix.PTRACE_O_TRACECLONE|unix.PTRACE_O_EXITKILL); err != nil {
				return 0, fmt.Errorf("tracing the plugin: %w", err)
			}
		}
		if err := tr.step(tid, status); err != nil && err != unix.ESRCH { // it was killed meanwhile
			return 0, fmt.Errorf("tracing the plugin: %w", err)
		}
	}
}

const syscallStop = unix.SIGTRAP | 0x80 // by PTRACE_O_TRACESYSGOOD

// step deals with one stop of a thread and lets it go on.
func (tr *tracer) step(tid int, status unix.WaitStatus) error {
	signal := status.StopSignal()
	switch {
	case signal == syscallStop:
		if err := tr.atCall(tid); err != nil {
			return err
		}
		signal = 0
	case signal == unix.SIGTRAP, signal == unix.SIGSTOP: // an event, or a new thread
		signal = 0
	}
	return unix.PtraceSyscall(tid, int(signal))
}

func (tr *tracer) atCall(tid int) error {
	tr.inCall[tid] = !tr.inCall[tid]
	if !tr.inCall[tid] {
		if tr.failing != tid {
			return nil
		}
		tr.failing = 0
		return returnErrno(tid, tr.errno)
	}
	number, err := callNumber(tid)
	if err != nil || !slices.Contains(tr.calls, number) {
		return err
	}
	if tr.count++; tr.count != tr.nth {
		return nil
	}
	if tr.errno == 0 {
		return unix.Kill(tr.pid, unix.SIGKILL)
	}
	tr.failing = tid
	return skipCall(tid)
}

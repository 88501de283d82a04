package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"tercet.dev/tercet/bench"
	"tercet.dev/tercet/internal/limits"
	"tercet.dev/tercet/raft"
)

// durabilityFlags are the flags of `tercet bench durability`.
type durabilityFlags struct {
	benchCluster
	workloadFlags
	faults []string
	every  time.Duration
	volume byteSize
}

func (a *app) benchDurabilityCommand() *cobra.Command {
	o := durabilityFlags{volume: 4 << 30}
	cmd := &cobra.Command{
		Use:   "durability",
		Short: "Break servers under load, and prove that nothing acknowledged is lost",
		Long: `Starts three servers and publishes to all of them while one after the other, and now and then all at
once, are killed, paused, and lose power: cut off from their disks, so that what was not synced is gone. Then it
accounts for every acknowledged message: through the healed cluster, and in each zone alone, which
'cluster recover' turns into a cluster of its own. Exit status 1 if a single one is missing anywhere.

Losses of power need root, loop devices and mkfs.ext4, because each server gets a file system of its own;
--faults kill,pause goes without.`,
		Example: examples(`
			sudo tercet bench durability
			tercet bench durability --faults kill,pause --duration 10m
			sudo tercet bench durability --faults power --every 5s --seed 7 -o json`),
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.benchDurability(cmd.Context(), o) },
	}
	o.registerShape(cmd, 24, 256, 1)
	o.register(cmd)
	f := cmd.Flags()
	f.StringSliceVar(&o.faults, "faults", []string{"kill", "pause", "power"}, "what happens to servers")
	f.DurationVar(&o.every, "every", 8*time.Second, "time between two faults")
	f.DurationVar(&o.Duration, "duration", time.Minute, "time under faults")
	f.Float64Var(&o.Rate, "rate", 2000, "messages a second of all publishers together")
	f.Uint64Var(&o.Seed, "seed", 1, "what decides which fault comes when")
	f.Var(&o.volume, "volume", "size of each server's file system")
	return cmd
}

func (a *app) benchDurability(ctx context.Context, o durabilityFlags) error {
	if err := o.benchCluster.check(); err != nil {
		return err
	}
	kinds, err := bench.ParseFaults(o.faults)
	if err != nil {
		return usageError{fmt.Errorf("--faults %w", err)}
	}
	o.Topic, o.Retention, o.Stamped, o.Warmup = "bench", limits.RetentionDefault, true, time.Second
	w, err := o.workload()
	if err != nil {
		return err
	}
	binary, err := os.Executable()
	if err != nil {
		return err
	}
	ctx, cancel := a.interruptible(ctx)
	defer cancel()
	dir, err := os.MkdirTemp(o.dir, "tercet-bench-")
	if err != nil {
		return err
	}
	volumes, unmount, err := o.volumes(ctx, dir, kinds)
	if err != nil {
		return codedError{exitPrecondition, errors.Join(fmt.Errorf("%w; --faults kill,pause goes without", err), os.RemoveAll(dir))}
	}
	before := func(i int) {
		if v := volumes[fmt.Sprintf("n%d", i+1)]; v != nil {
			_ = v.Await(ctx) // without it the server says what is wrong
		}
	}
	s, stopCluster, err := o.startIn(ctx, dir, "tercet", binary, true, before)
	if err != nil {
		return errors.Join(ended(ctx, err), unmount(), os.RemoveAll(dir))
	}
	var once sync.Once
	stop := func() { once.Do(stopCluster) }
	defer func() {
		stop()
		if err := unmount(); err != nil {
			fmt.Fprintf(a.err, "%v\n", err)
		}
		o.discard(a, dir)
	}()
	r, err := bench.Durability(ctx, s, bench.DurabilityPlan{
		Workload: w, Faults: kinds, Every: o.every, Seed: o.Seed, Volumes: volumes, Progress: a.progress(),
		Notice: func(line string) { fmt.Fprintln(a.err, line) },
		Alone: func(ctx context.Context, node string) (*bench.Subject, func(), error) {
			stop()
			return startAlone(ctx, binary, filepath.Join(dir, node), node)
		},
	})
	if r == nil {
		return ended(ctx, err)
	}
	r.Command, r.Version = commandLine(), version
	if printed := a.print(r, r.Text); printed != nil || err != nil {
		return errors.Join(printed, ended(ctx, err))
	}
	if lost := r.Lost(); lost > 0 || !r.Equal {
		return fmt.Errorf("%d acknowledged messages are lost, replicas equal: %t", lost, r.Equal)
	}
	return nil
}

// volumes makes a file system for each server, if a fault needs them. unmount removes them.
func (o *durabilityFlags) volumes(ctx context.Context, dir string, kinds []bench.FaultKind) (all map[string]*bench.Volume, unmount func() error, err error) {
	all = map[string]*bench.Volume{}
	unmount = func() error {
		var failed error
		for _, v := range all {
			failed = errors.Join(failed, v.Close())
		}
		return failed
	}
	for _, k := range kinds {
		if k != bench.FaultPower || len(all) > 0 {
			continue
		}
		for i := range 3 {
			id := fmt.Sprintf("n%d", i+1)
			v, err := bench.NewVolume(ctx, filepath.Join(dir, id), int64(o.volume))
			if err != nil {
				return nil, nil, errors.Join(err, unmount())
			}
			all[id] = v
		}
	}
	return all, unmount, nil
}

// startAlone makes a cluster of one out of a stopped server's data and starts it.
func startAlone(ctx context.Context, binary, data, node string) (*bench.Subject, func(), error) {
	if _, err := raft.Recover(data, true); err != nil {
		return nil, nil, err
	}
	httpAddr, err := freeLoopbackAddress()
	if err != nil {
		return nil, nil, err
	}
	peerAddr, err := freeLoopbackAddress()
	if err != nil {
		return nil, nil, err
	}
	var log bytes.Buffer
	cmd := exec.CommandContext(ctx, binary, "server", "--node-id", node, "--data", data, "--http", httpAddr, "--peer", peerAddr)
	cmd.Stderr = &log
	if err := cmd.Start(); err != nil {
		return nil, nil, err
	}
	var result error
	done := make(chan struct{})
	go func() { defer close(done); result = cmd.Wait() }()
	stop := func() {
		_ = cmd.Process.Kill() // it may have ended
		<-done
	}
	wait, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for !isReady(wait, httpAddr) {
		select {
		case <-done:
			return nil, nil, fmt.Errorf("the server ended: %w: %s", result, log.Bytes())
		case <-wait.Done():
			stop()
			return nil, nil, fmt.Errorf("the server is not ready: %w: %s", wait.Err(), log.Bytes())
		case <-time.After(20 * time.Millisecond):
		}
	}
	return &bench.Subject{Variant: "tercet", Nodes: []bench.SubjectNode{{ID: node, HTTP: httpAddr, Data: data}}}, stop, nil
}

// isReady asks a server.
func isReady(ctx context.Context, addr string) bool {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+"/readyz", nil)
	if err != nil {
		return false
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return false
	}
	resp.Body.Close()
	return resp.StatusCode == http.StatusOK
}
